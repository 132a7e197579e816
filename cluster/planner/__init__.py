"""Planning, pure: what a worker can do, what comes, how long it queues, how many to have."""
