"""The command line: plan, up, chat and bench on one machine, no cluster needed."""
