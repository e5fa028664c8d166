"""Gaussian data, whose exact denoiser, likelihood and reverse steps are known."""

from typing import Any

import torch
from diffusers import DDIMScheduler

from t2i.diffusion.process import alpha_sigma, build_noise_scheduler, x0_to_prediction

SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def schedule(name: str = "cosine", prediction_type: str = "v_prediction", **settings: object) -> Any:
    if prediction_type == "flow_prediction":
        return build_noise_scheduler({"prediction_type": prediction_type, **settings})
    settings = {**SCHEDULES[name], "timestep_spacing": "trailing", "clip_sample": False, **settings}
    return DDIMScheduler(prediction_type=prediction_type, **settings)


class Gaussian:
    """N(mean, covariance) in D dimensions, fp64."""

    def __init__(self, variances: tuple[float, ...] = (1.5, 0.6, 0.2), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(torch.randn(len(variances), len(variances), generator=generator).double())
        self.mean = torch.linspace(-0.5, 0.8, len(variances), dtype=torch.float64)
        self.covariance = turn @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ turn.T
        self.distribution = torch.distributions.MultivariateNormal(self.mean, self.covariance)

    def draw(self, count: int, seed: int = 0) -> torch.Tensor:
        noise = torch.randn(count, len(self.mean), generator=torch.Generator().manual_seed(seed)).double()
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T

    def estimate_x0(self, scheduler, x, t):
        """E[x0 | x_t]; t: () ."""
        alpha, sigma = alpha_sigma(scheduler, t, x)
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()
        return self.mean + torch.linalg.solve(noisy, (x - alpha * self.mean).T).T @ self.covariance * alpha

    def denoiser(self, scheduler):
        """The exact one, as a `Predict`."""
        return lambda x, t: x0_to_prediction(scheduler, self.estimate_x0(scheduler, x, t), x, t)

    def standardised(self, x):
        """Samples as they would be N(0, 1) in each of D independent directions."""
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.covariance), (x - self.mean).T, upper=False).T
