"""gRPC at the coordinator's edge: protobuf in, frozen values and refusals out."""
