"""The kinds of edit as a card explains them: words, formulas in KaTeX, tags and papers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper that introduced a method."""

    authors: str
    title: str
    year: int
    arxiv: str


_ACE = Paper(
    "Marshall, Scherlis, Belrose", "Refusal in LLMs is an Affine Function", 2024, "2411.09003"
)
_LEACE = Paper(
    "Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman",
    "LEACE: Perfect linear concept erasure in closed form",
    2023,
    "2306.03819",
)
_REFUSAL = Paper(
    "Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda",
    "Refusal in Language Models Is Mediated by a Single Direction",
    2024,
    "2406.11717",
)
_ACTADD = Paper(
    "Turner, Thiergart, Leech, Udell, Vazquez, Mini, MacDiarmid",
    "Steering Language Models With Activation Engineering (ActAdd)",
    2023,
    "2308.10248",
)
_CAA = Paper(
    "Panickssery, Gabrieli, Schulz, Tong, Hubinger, Turner",
    "Steering Llama 2 via Contrastive Activation Addition",
    2023,
    "2312.06681",
)
_ACT = Paper(
    "Rodriguez, Blaas, Klein, Zappella, Apostoloff, Cuturi, Suau",
    "Controlling Language and Diffusion Models by Transporting Activations (AcT)",
    2024,
    "2410.23054",
)
_AURA = Paper(
    "Suau, Delobelle, Metcalf, Joulin, Apostoloff, Zappella, Rodriguez",
    "Whispering Experts: Neural Interventions for Toxicity Mitigation in Language Models (AurA)",
    2024,
    "2407.12824",
)
_ROME = Paper(
    "Meng, Bau, Andonian, Belinkov",
    "Locating and Editing Factual Associations in GPT (ROME)",
    2022,
    "2202.05262",
)
_REFT = Paper(
    "Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts",
    "ReFT: Representation Finetuning for Language Models (LoReFT)",
    2024,
    "2404.03592",
)


@dataclass(frozen=True, slots=True)
class Method:
    """A kind of edit.

    Attributes:
        name: what it is called in a sentence: "an …".
        did: what it did to a concept: "ablated", for the headline.
        activation: the map on activations.
        weights: what becomes of a weight W and a bias b that write to the site.
        where: the letters.
        tag: on the Hub.
        papers: that introduced it.
    """

    name: str
    did: str
    activation: str
    weights: str
    where: str
    tag: str
    papers: tuple[Paper, ...]


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ablate": Method(
            "an ablation",
            "ablated",
            r"x \mapsto x - s\,U U^{\top} x",
            r"W' = W - s\,U U^{\top} W, \qquad b' = b - s\,U U^{\top} b",
            "*U* is an orthonormal basis of the direction or subspace, *s* the strength",
            "directional-ablation",
            (_REFUSAL,),
        ),
        "affine": Method(
            "an affine edit",
            "set to a constant",
            r"x \mapsto x + s\,\bigl(-P\,(x - \mu) + \alpha\,r\bigr)",
            r"W' = W - s\,P\,W, \qquad b' = b - s\,P\,b, \qquad c = s\,(P\,\mu + \alpha\,r)",
            "*P* projects onto the span of the direction, *μ* is the mean that is set in its "
            "place, *r* the direction as it was fitted, *s* the strength; the constant *c* is "
            "added once, in the embedding's rows or in a bias",
            "affine-concept-editing",
            (_ACE,),
        ),
        "erase": Method(
            "an oblique erasure",
            "erased",
            r"x \mapsto x - s\,L\,R\,(x - \mu)",
            r"W' = W - s\,L\,R\,W, \qquad b' = b - s\,L\,R\,b, \qquad c = s\,L\,R\,\mu",
            "*L R* is the eraser's oblique projection, *μ* its mean, *s* the strength; the "
            "constant *c* is added once, in the embedding's rows or in a bias",
            "concept-erasure",
            (_LEACE,),
        ),
        "offset": Method(
            "an offset",
            "added",
            r"x \mapsto x + c\,v",
            r"b' = b + c\,v",
            "*v* is the vector as it was fitted, *c* the coefficient; in the embedding, every row "
            "is such a *b*",
            "activation-addition",
            (_CAA, _ACTADD),
        ),
        "scale": Method(
            "a scale per channel",
            "scaled",
            r"x \mapsto a \odot x + b_0",
            r"W' = \operatorname{diag}(a)\,W, \qquad b' = a \odot b + b_0",
            "*a* and *b₀* are blended with the identity by the strength",
            "activation-scaling",
            (_ACT, _AURA),
        ),
        "rotate": Method(
            "a rotation",
            "rotated",
            r"x \mapsto Q\,x",
            r"W' = Q\,W, \qquad b' = Q\,b",
            "*Q* is orthogonal",
            "activation-rotation",
            (),
        ),
        "linear": Method(
            "an affine map",
            "mapped",
            r"x \mapsto A\,x + b_0",
            r"W' = A\,W, \qquad b' = A\,b + b_0",
            "*A* and *b₀* are blended with the identity by the strength",
            "representation-editing",
            (_REFT,),
        ),
        "update": Method(
            "an update of a weight",
            "written into a weight",
            r"W' = W + s\,L\,R",
            r"W' = W + s\,L\,R",
            "*L R* is the update as it was fitted, *s* the strength",
            "model-editing",
            (_ROME,),
        ),
    }
)
READERS = r"W' = W A, \qquad b' = b + W\,c \qquad\text{where the edit is } x \mapsto A\,x + c"
"""What becomes of a weight that reads the site, where the plan folds the edit into its readers."""
