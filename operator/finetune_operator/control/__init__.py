"""Work queue, workers, kopf wiring, progress server: the only place where things happen."""
