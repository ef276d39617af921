import unittest

from src.payments import CardDeclined, GatewayTimeout, PaymentFailed, charge


class Gateway:
    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = 0

    def charge(self, card, cents):
        self.calls += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Charging(unittest.TestCase):
    def test_a_receipt_is_returned(self):
        self.assertEqual(charge(Gateway("receipt-1"), "4242", 500), "receipt-1")

    def test_a_timeout_is_tried_again(self):
        gateway = Gateway(GatewayTimeout(), "receipt-2")
        self.assertEqual(charge(gateway, "4242", 500), "receipt-2")
        self.assertEqual(gateway.calls, 2)

    def test_a_declined_card_is_not_tried_again(self):
        gateway = Gateway(CardDeclined("insufficient funds"), "must not be reached")
        with self.assertRaises(CardDeclined):
            charge(gateway, "4000", 500)
        self.assertEqual(gateway.calls, 1)

    def test_a_gateway_that_never_answers_is_an_error(self):
        gateway = Gateway(GatewayTimeout(), GatewayTimeout(), GatewayTimeout())
        with self.assertRaises(PaymentFailed):
            charge(gateway, "4242", 500)


if __name__ == "__main__":
    unittest.main()
