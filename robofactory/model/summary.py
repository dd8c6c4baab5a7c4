"""Count the parameters and the tokens of the model that a recipe fine-tunes, without its weights, in seconds."""

import argparse

from robofactory import arguments
from robofactory.config import RecipeConfig, load_recipe
from robofactory.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(
        prog="robofactory summary",
        description=__doc__,
        epilog="""\
examples:
  robofactory summary
  robofactory summary model.use_proprio=true model.lora_vision=true
  robofactory summary data.views=[side] model.global_token=false      the official model, one picture""",
    )
    parser.add_argument("--recipe", default="robot_openvla", help="a name in robofactory/configs or a .yaml file (default: robot_openvla)")  # fmt: skip
    parser.add_argument("--proprio_dim", type=arguments.whole(1, 10_000), default=8, help="numbers of joint positions, with model.use_proprio=true (default: 8)")  # fmt: skip
    parser.add_argument(
        "--text_tokens", type=arguments.whole(0, 100_000), default=20, help="of the prompt, without BOS (default: 20)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    print(summary(load_recipe(args.recipe, args.overrides), args.proprio_dim, args.text_tokens))


def summary(recipe: RecipeConfig, proprio_dim: int, text_tokens: int) -> str:
    """Tables of the parameters by part, and of the tokens of the sequence.

    Raises:
        UserError: the recipe trains from scratch, or its weights are not there.
    """
    from robofactory.model.lora import build_untrained, parameter_table
    from robofactory.model.weights import published_config

    m, views = recipe.model, recipe.data.views
    if m.architecture is not None:
        raise UserError(
            f"{m.model_name} is trained from scratch at the recipe's own sizes; choose --recipe robot_openvla"
        )
    model = build_untrained(m, published_config(m.model_name), proprio_dim if m.use_proprio else None)
    per_view = model.vision_backbone.tokens_per_view
    visual, proprio = per_view * len(views), int(m.use_proprio)
    return f"""\
{m.model_name}: parameters
{parameter_table(model)}

tokens
visual             {visual:>6}  {len(views)} x {per_view} ({", ".join(views)})
before the actions {1 + visual + proprio + text_tokens:>6}  BOS 1, visual {visual}, {"proprio 1, " if proprio else ""}text {text_tokens}"""


if __name__ == "__main__":
    run_command(main)
