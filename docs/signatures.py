"""Signatures of Equinox modules for the reference: the fields of such a class are the arguments of its constructor."""

import griffe


def _default(attribute: griffe.Attribute) -> griffe.Expr | str | None:
    """The default of a field, as written. A call of `eqx.field` has it as an argument."""
    value = attribute.value
    if isinstance(value, griffe.ExprCall) and str(value.function).endswith("field"):
        keywords = {a.name: a.value for a in value.arguments if isinstance(a, griffe.ExprKeyword)}
        return keywords.get("default")
    return value


def _is_argument(attribute: griffe.Attribute) -> bool:
    return not attribute.name.startswith("_") and "init=False" not in str(attribute.value or "")


class Signatures(griffe.Extension):
    """Gives every class that documents its arguments, and has no `__init__`, one made from its fields."""

    def on_class(self, *, cls: griffe.Class, **kwargs):
        documented = cls.docstring is not None and "**Arguments" in cls.docstring.value
        fields = [a for a in cls.attributes.values() if a.annotation is not None and _is_argument(a)]
        if not documented or "__init__" in cls.members or not fields:
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        parameters += [
            griffe.Parameter(a.name, annotation=a.annotation, kind=kind, default=_default(a)) for a in fields
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))
