"""`arriero-download`: fetches a checkpoint from a hub or an object store into a directory, before a worker starts."""
