"""How sure is a mean over few units, such as prompts? Intervals, p-values, several at once.

    bootstrap   the 95 % interval of a mean: Efron's percentiles, the units drawn anew with return
    sign_flip   the p-value of 'the mean is 0' for paired differences: each keeps or changes its
                sign at random (Fisher's randomisation test, two-sided)
    holm        p-values of several tests, so that the chance of any wrong one stays what it says:
                Holm 1979
    lowest      where a curve that was measured with several seeds has its minimum, if it has one
All are repeatable: the draws are those of a seed.
"""
import numpy as np

DRAWS = 10_000

def bootstrap(values, seed=0):
    """(low, high) of the mean of values [n]; NaN for fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS // 5, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)

def sign_flip(differences, seed=0):
    """At least 1 / (DRAWS + 1): the draw that was made is one of them."""
    d = np.asarray(differences, float)
    signs = np.random.default_rng(seed).integers(0, 2, (DRAWS, len(d))) * 2 - 1
    larger = np.abs(signs @ d) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()
    return float((larger.sum() + 1) / (DRAWS + 1))

def holm(p):
    """Adjusted p-values, in the order given."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    worst = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    out = np.empty_like(p)
    out[order] = np.minimum(1, worst)
    return out.tolist()

def lowest(curve, highest=False):
    """Of {x: [value of each seed]}, x ascending: at, where the mean is lowest; by_seed, where each
    seed is; alike, where the mean is above that by no more than its spread, largest less smallest
    of the seeds. sure: whether it is a minimum, neither at an end nor with a side that nowhere lies
    above it by more than its spread, which one seed does not have; verdict, in words. highest: the
    same of a maximum."""
    xs, values = list(curve), np.array(list(curve.values()), float) * (-1 if highest else 1)
    mean = values.mean(1)                                                            # (n,)
    i, kind = int(mean.argmin()), "maximum" if highest else "minimum"
    spread, verdict = np.ptp(values[i]), kind
    if i in (0, len(xs) - 1):
        end = "last" if i else "first"
        verdict = f"no {kind}: {'highest' if highest else 'lowest'} at the {end}"
    elif min(mean[:i].max(), mean[i + 1:].max()) - mean[i] <= spread:
        verdict = f"no {kind}: flat on one side, within the spread over seeds"
    elif values.shape[1] < 2:
        verdict = "of one seed, whose spread is not known"
    return dict(at=xs[i], by_seed=[xs[j] for j in values.argmin(0)], sure=verdict == kind,
                alike=[x for x, m in zip(xs, mean) if m - mean[i] <= spread], verdict=verdict)
