"""gRPC in front of the front end: messages in and out, statuses, health, start and drain."""
