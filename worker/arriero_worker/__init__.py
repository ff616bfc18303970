"""The worker: our Llama engine and its public and control servers, one process per device."""
