"""How bytes and requests travel: the HTTP client, the communicator, the fleet."""
