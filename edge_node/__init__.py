"""One edge node: sockets in the parent process, one model release per child process."""
