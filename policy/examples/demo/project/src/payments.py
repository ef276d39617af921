"""Charge cards through a gateway that sometimes fails."""


class GatewayTimeout(Exception):
    """The gateway did not answer; the charge may be tried again."""


class CardDeclined(Exception):
    """The bank said no; trying again would charge the customer's patience."""


class PaymentFailed(Exception):
    """The charge did not happen."""


def charge(gateway, card, cents, attempts=3):
    """Charge a card and return the receipt."""
    for _ in range(attempts):
        try:
            return gateway.charge(card, cents)
        except Exception:
            continue
    return None
