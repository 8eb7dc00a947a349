"""The subspaces that gradient projection trains in: found by SVD, from a sketch, or at random; turned, compared, rotated."""

import torch

from layerpeft.selection.draws import seed_of

SIDES = ("right", "left", "std", "reverse_std")


def side_of(proj_type: str, out: int, into: int) -> str:
    """The side that is projected, "right" (Q spans part of the inputs) or "left", for a weight (out, in), as in GaLore."""
    if proj_type in ("right", "left"):
        return proj_type
    tall = out >= into
    return "right" if tall == (proj_type == "std") else "left"


def random_matrix(key: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Gaussian numbers (rows, columns), equal on every device and in every process for the same key."""
    generator = torch.Generator().manual_seed(seed_of(key))
    return torch.randn(rows, columns, generator=generator).to(device=like.device, dtype=like.dtype)


def random_basis(key: str, rank: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(rank, size): orthonormal rows that span a random subspace (FLORA, arXiv 2402.03293; APOLLO, arXiv 2412.05270)."""
    return torch.linalg.qr(random_matrix(key, size, rank, like.float()))[0].T.contiguous()


def sketching_matrix(key: str, warm: torch.Tensor, extra: int) -> torch.Tensor:
    """(rows, k) orthonormal columns to sketch a gradient with: the columns of `warm` (rows, r), and `extra` random ones.

    The subspace that a period has trained in is the start of a subspace iteration towards the gradient's strongest directions
    (randomized range finder, arXiv 0909.4061, algorithm 4.4); the random columns let new directions in.
    """
    warm = warm.float()
    fresh = random_matrix(key, warm.shape[0], extra if bool(warm.any()) else extra + warm.shape[1], warm)
    both = torch.cat([warm, fresh], 1) if bool(warm.any()) else fresh
    both = both / both.norm(dim=0).clamp(min=torch.finfo(both.dtype).tiny)
    return torch.linalg.qr(both[:, : both.shape[0]])[0]


def strongest(seen: torch.Tensor, rank: int, side: str, *, wide: bool = False) -> torch.Tensor | None:
    """(rank, size) orthonormal rows: the strongest singular vectors of `seen` on that side; None where there are not so many.

    Computed in float32 as in the reference, `wide`: in float64; where LAPACK does not converge, on slightly changed numbers.
    """
    seen = seen.double() if wide else seen.float()
    if min(seen.shape) < rank or not bool(torch.isfinite(seen).all()) or not bool(seen.any()):
        return None
    for noise in (0.0, 1e-6, 1e-4):
        jitter = (
            noise * seen.abs().max() * random_matrix("jitter", seen.shape[0], seen.shape[1], seen) if noise else 0.0
        )
        try:
            u, _, vh = torch.linalg.svd(seen + jitter, full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        found = vh[:rank] if side == "right" else u[:, :rank].T
        if bool(torch.isfinite(found).all()):
            return found.contiguous()
    return None


def aligned(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` (r, size) turned within its own span to lie nearest to `old`: `(U Vᵀ) new`, with `U, _, Vᵀ = svd(old newᵀ)`."""
    u, _, vh = torch.linalg.svd(old @ new.T)
    return (u @ vh) @ new


def overlap(new: torch.Tensor, old: torch.Tensor) -> float:
    """How much of one subspace lies in the other: the mean squared cosine of their principal angles, 0 to 1."""
    return float((old.float() @ new.float().T).square().sum() / new.shape[0])


def rotation(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(r, r): what takes coordinates in the old basis to those in the new one, `old newᵀ`."""
    return old @ new.T
