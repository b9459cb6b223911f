"""The local supervisor behind `make up`: a router, its nodes and a Consul, kept running on one machine.

machine (P) decides, plan (P) knows what a process is started with, run (I) carries it out.
It knows no more of the services than their commands, their configuration keys and `/readyz`.
"""
