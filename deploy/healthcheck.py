"""Ends with 0 when /readyz on this port answers 200: `healthcheck.py PORT`. A bare socket, for it runs every few seconds."""

import socket
import sys

with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2) as connection:
    connection.sendall(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    sys.exit(not connection.recv(64).startswith(b"HTTP/1.1 200 "))
