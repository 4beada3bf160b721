"""Triality of Spin(8): one set of so(8) coordinates, carried from the vectors V into both half-spin representations S+ and S-.

The octonions (R^8 with the orthonormal basis `e_0 = 1, e_1, ..., e_7`) give a trilinear form, and the form Clifford generators:

    t(v, s+, s-) = Re(v s+ s-) = s+^T g(v) s-,    g(v) = sum_k v_k g_k,    g_i g_j^T + g_j g_i^T = 2 delta_ij I

and the generators the half-spin representations of so(8), for a skew matrix `A` on V:

    rho+(A) = 1/4 sum_ij A_ij g_i g_j^T,    rho-(A) = 1/4 sum_ij A_ij g_i^T g_j

Both values are skew 8 x 8 matrices again, so in the coordinates of `so8t.so8.skew` they are linear maps of R^28:
`D_SIGMA_PLUS` and `D_SIGMA_MINUS`, Lie-algebra automorphisms that are orthogonal and not inner. `Re(xyz) = Re(yzx)` makes the
form cyclic; hence, for these bases of V, S+ and S-, `D_SIGMA_MINUS = D_SIGMA_PLUS^2` and `D_SIGMA_PLUS^3 = I`. In other
bases of S+ and S- the maps are these followed by conjugations, and may have other orders.

Source: J. C. Baez, "The Octonions", Bull. Amer. Math. Soc. 39 (2002), sections 2.1 (the table), 2.3 (Clifford algebras) and 2.4
(spinors and trialities). This file knows torch and `so8t.so8` only.
"""

import torch
from torch import Tensor

from so8t.so8 import COORDS, DIM, skew


def octonion_table() -> Tensor:
    """Structure constants `[8, 8, 8]`, `e_i e_j = sum_k table[i, j, k] e_k`, from the seven lines `e_i e_(i+1) = e_(i+3)`."""
    table = torch.zeros(DIM, DIM, DIM, dtype=torch.float64)
    for i in range(DIM):
        table[0, i, i] = table[i, 0, i] = 1
    for i in range(1, DIM):
        table[i, i, 0] = -1
        line = (i, i % 7 + 1, (i + 2) % 7 + 1)
        for a, b, c in (line, line[1:] + line[:1], line[2:] + line[:2]):
            table[a, b, c], table[b, a, c] = 1, -1
    return table


def _form() -> Tensor:
    """`[8, 8, 8]`, `Re((e_k e_a) e_b)`; the brackets do not matter to the real part."""
    table = octonion_table()
    return torch.einsum("kam,mb->kab", table, table[..., 0])


FORM = _form()
"""The trilinear form on V x S+ x S-, `[8, 8, 8]` float64 with entries 0 and +-1; `FORM[k]` is the generator `g_k: S- -> S+`."""


def half_spin(a: Tensor) -> tuple[Tensor, Tensor]:
    """`(rho+(A), rho-(A))` of skew matrices: `[..., 8, 8] -> ([..., 8, 8], [..., 8, 8])` in float64."""
    a = a.double()
    form = FORM.to(a.device)
    plus = torch.einsum("...ij,ipm,jqm->...pq", a, form, form) / 4
    minus = torch.einsum("...ij,imp,jmq->...pq", a, form, form) / 4
    return plus, minus


def _d_sigma() -> tuple[Tensor, Tensor]:
    """Both maps, column by column: what becomes of each coordinate of so(8)."""
    rows, cols = torch.triu_indices(DIM, DIM, offset=1)
    plus, minus = half_spin(skew(torch.eye(COORDS, dtype=torch.float64)))
    return plus[:, rows, cols].T.contiguous(), minus[:, rows, cols].T.contiguous()


D_SIGMA_PLUS, D_SIGMA_MINUS = _d_sigma()
"""`[28, 28]` float64 with entries 0 and +-1/2: `skew(D_SIGMA_PLUS @ a) = rho+(skew(a))`, and likewise for S-."""


def carry(coords: Tensor, d_sigma: Tensor) -> Tensor:
    """`d_sigma a` for coordinates `[..., 28] -> [..., 28]`, in float64. `exp` of it is the linked rotation of S+ or S-."""
    return coords.double() @ d_sigma.T.to(coords.device)


def trilinear_form(v: Tensor, s_plus: Tensor, s_minus: Tensor) -> Tensor:
    """`t(v, s+, s-) = Re(v s+ s-)`: three `[..., 8] -> [...]`, in their dtype; at most `|v| |s+| |s-|`.

    Invariant: `t(exp(A) v, exp(d_sigma+ A) s+, exp(d_sigma- A) s-) = t(v, s+, s-)`. So whoever turns all three arguments by one
    `A` reads nothing of `A`.
    """
    generators = FORM.reshape(DIM * DIM, DIM).to(s_minus)
    on_s_plus = (s_minus @ generators.T).reshape(*s_minus.shape, DIM)  # g_k s-, an element of S+ for every k
    return ((on_s_plus @ s_plus[..., None])[..., 0] * v).sum(-1)
