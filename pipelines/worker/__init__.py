"""Fine-tuning as a service: one job at a time over HTTP, for any model that implements FineTuningInterface.

    interface        the six methods of a model: dataset, train, eval, test, save, status
    whisper_tasks    the lab's pipelines behind that interface; whisper_parameters: what clients may send
    event_log        the lines that jobs report, stored on disk
    process          the child process that runs tasks, and ends with its server
    job_process      the server's side of that process
    jobs             one job at a time, whose state outlives the server
    middleware       checks of requests before they are read
    api              routes and the page

Tasks run in a child process, so that a task can be cancelled, killed or run out of memory without the server. A server
that is started again after a kill resumes its job.
"""
