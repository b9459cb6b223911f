# One Consul agent for one machine: `consul agent -dev -config-file=configs/consul/dev.hcl`, with the ports
# given on the command line (scripts/supervisor/plan.py). Everything is in memory and on loopback.

bind_addr   = "127.0.0.1"
client_addr = "127.0.0.1"

# Nobody here asks over DNS or gRPC, and a port not opened cannot be taken.
ports {
  dns  = -1
  grpc = -1
}

# The agent would ask its maker for newer versions; this project speaks to loopback only.
disable_update_check = true
