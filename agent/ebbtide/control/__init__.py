"""What both roles use to run other processes: control sockets, launching, state, devices."""
