"""OpenAI's Responses API: answers that are kept, and can be read, followed, continued, cancelled and deleted by id."""
