"""The OpenAI HTTP face of the router."""
