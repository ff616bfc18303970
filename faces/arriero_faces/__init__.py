"""What the programs with public faces share: the HTTP/1.1 core, errors, resuming, prefix marks, process set-up."""
