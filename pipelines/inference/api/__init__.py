"""An HTTP API that transcribes, in the shape that OpenAI's clients expect.

    shapes   what is answered: transcripts, models, health, errors
    desk     one decoding at a time, a few that wait, nobody for ever
    gate     what is asked of a request before its body is believed: token, a free place, size, time
    api      the addresses
    page     the API in words, at /docs
    server   a socket, uvicorn, and a clean end

A recording is held in memory or in a nameless temporary file, and is gone with its request.
"""
