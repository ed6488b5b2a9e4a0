"Workers that die, stop or are slow, in a module that is quick to import."
import os
import signal
import time


def clumsy(folder):
    "Some structures kill the worker, stop it or upset it."
    def answer(structures):
        if "BOOM" in structures: os.kill(os.getpid(), signal.SIGKILL)
        if "HANG" in structures: time.sleep(600)
        if "ODD" in structures: raise RuntimeError("odd")
        return [[s.lower()] for s in structures], {i: "digit" for i, s in enumerate(structures) if s.isdigit()}
    return answer


def slow(folder):
    "The model, but not in a hurry."
    from matfm.app.bulk import open_answers
    answer = open_answers(folder)
    return lambda structures: (time.sleep(0.3), answer(structures))[1]


def mute(folder): raise RuntimeError("the model cannot be opened")
