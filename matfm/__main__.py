from matfm.app.cli import main

main()
