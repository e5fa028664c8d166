"""Estimates of the time that a request has left, from the steps that it and others took."""

import time

SMOOTHING = 0.8  # of the moving average of a step's seconds


class Pace:
    """Seconds that a step of each stage takes, as the requests of one model learned it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def learn(self, stage: str, seconds: float) -> None:
        """Take the seconds of a step into the average of its stage."""
        before = self.seconds.get(stage, seconds)
        self.seconds[stage] = SMOOTHING * before + (1 - SMOOTHING) * seconds


class Forecast:
    """Forecast of the end of one request.

    pace: of others; None for images of another size, whose own steps alone tell. stages: the steps of its stages, in
    their order.
    """

    def __init__(self, pace: Pace | None, stages: dict[str, int]):
        self.pace, self.stages = pace or Pace(), stages
        self.own = Pace()  # of this request alone, whose images may be larger or more
        self.last: tuple[str, int, float] | None = None

    def report_step(self, stage: str, step: int, steps: int, now: float | None = None) -> float | None:
        """Return the seconds left after a step; None while nothing is known. now: as of `time.monotonic`."""
        now = time.monotonic() if now is None else now
        if self.last is not None and self.last[0] == stage and step > self.last[1]:
            # Steps that nobody reported are between the two
            seconds = (now - self.last[2]) / (step - self.last[1])
            self.own.learn(stage, seconds)
            self.pace.learn(stage, seconds)
        self.last = (stage, step, now)
        names = list(self.stages)
        later = names[names.index(stage) + 1 :] if stage in names else []
        left = {stage: steps - step} | {name: self.stages[name] for name in later}
        paces = {name: self.own.seconds.get(name, self.pace.seconds.get(name)) for name in left}
        if any(seconds is None for name, seconds in paces.items() if left[name]):
            return None
        return sum(count * (paces[name] or 0.0) for name, count in left.items())
