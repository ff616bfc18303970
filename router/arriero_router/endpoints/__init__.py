"""Where the replicas are (sources) and how they are (followers). All of it runs on one event loop, without threads."""
