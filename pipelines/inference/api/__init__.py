"""An HTTP API that transcribes, compatible with OpenAI's clients.

    schemas             responses: transcripts, models, health, errors
    queue               one decoding at a time, a limited number of waiting requests
    middleware          token, rate, free slot, size and time of a request
    forms               forms as clients send them, and fields that are refused
    model_names         names of the model that clients may send
    transcriptions      the route that transcribes a file
    event_stream        the transcript as server-sent events
    realtime            the WebSocket for live audio
    realtime_messages   its client's messages and settings
    api                 the other routes, and the app around all
    responses           transcripts and model facts as responses
    docs_page           the documentation at /docs

A recording is stored in memory or in an unnamed temporary file and is deleted with its request.
"""
