"""The rim: aiohttp handlers that carry bytes between clients and the session table."""
