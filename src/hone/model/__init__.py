"""The one model definition that the trainer and the engine share."""
