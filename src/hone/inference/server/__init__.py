"""The inference server: an engine behind the OpenAI API, the admin routes and the token channel."""
