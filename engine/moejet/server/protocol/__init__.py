"""The dialects that the server speaks: what a request may hold, what it asks of the engine, and how answers look."""
