"""Fine-tuning as a service: one job at a time over HTTP, for any model that keeps to the interface.

    interface  what a model has to be able to do: dataset, train, eval, test, save, status
    whisper    the lab's own pipelines behind that interface
    events     what jobs tell, line after line, kept on the disk
    places     what a line may not tell: where things lie on this machine
    child      the process that does tasks, and ends with its server
    jobs       one job at a time, whose state outlives the server
    guard      what is asked of a request before it is believed: where it comes from, a token, a size
    api        the addresses, and the page

Tasks run in a process apart, so that one can be cancelled, killed or run out of memory without the server. A
server that was killed goes on, once it is started again, with the job that it had.
"""
