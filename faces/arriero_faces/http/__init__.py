"""An HTTP/1.1 server core on asyncio.Protocol and httptools: it knows nothing of models, only of bytes and limits."""
