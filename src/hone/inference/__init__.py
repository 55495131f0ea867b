"""Inference: the engine, its server (OpenAI API, admin routes, token channel) and the clients of both."""
