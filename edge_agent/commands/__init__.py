"""What a person types on the device, a module for each command; `edge_agent.app` wires them."""
