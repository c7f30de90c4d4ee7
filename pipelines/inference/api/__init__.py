"""An HTTP API that transcribes, compatible with OpenAI's clients.

    schemas      responses: transcripts, models, health, errors
    queue        one decoding at a time, a limited number of waiting requests
    middleware   token, free slot, size and time of a request
    forms        forms as clients send them, and fields that are refused
    api          the routes
    responses    transcripts and model facts as responses
    docs_page    the documentation at /docs

A recording is stored in memory or in an unnamed temporary file and is deleted with its request.
"""
