"""The endpoint that clients connect to: takes each client to a healthy node and carries its stream."""
