"""What a run does in each of its phases, without I/O; `coordinator.rounds` joins them."""
