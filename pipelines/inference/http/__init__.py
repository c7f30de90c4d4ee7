"""What the API, the app and the worker share as HTTP servers.

server        socket, uvicorn and shutdown
protocol      limits on the heads of requests
guard         token, origin, size and sending time of a request
remote        recordings at addresses that clients name
rate_limits   requests and seconds of audio per minute of a client's address
"""
