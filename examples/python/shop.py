"""A shop outside Consign: places an order by publishing an event, and waits for what becomes of it.

Everything on the wire is a CloudEvent 1.0 in NATS binary mode, so stock clients are all it takes: nats-py and cloudevents.

    python shop.py --customer ada --gift-note "Happy birthday!" lamp=2

Exit codes: 0 confirmed; 1 refused or cancelled; 2 it could not be tried, or nobody answered in time.
"""

import argparse
import asyncio
import sys
import uuid

import nats
from cloudevents.core.bindings.http import HTTPMessage, from_binary_event, to_binary_event
from cloudevents.core.v1.event import CloudEvent
from nats.js.api import DeliverPolicy

TYPE = "storefront.order_requested.v1"


def to_nats(event):
    """NATS binary mode: attributes in headers, as in HTTP's binding, which the SDK has."""
    message = to_binary_event(event)
    # With an id of the broker's, publishing again what was not acknowledged stores it once.
    headers = {**message.headers, "Nats-Msg-Id": event.get_id()}
    return headers, message.body


def from_nats(message):
    return from_binary_event(HTTPMessage(headers=dict(message.headers), body=message.data))


async def connect(url):
    trouble = ["no answer"]

    async def remember(error):
        trouble[0] = str(error)

    try:
        async with asyncio.timeout(5):
            return await nats.connect(url, name="python shop", error_cb=remember)
    except TimeoutError:
        raise OSError(trouble[0]) from None


async def place_order(options):
    client = await connect(options.nats)
    stream = client.jetstream(timeout=5)

    # The id is the shop's to make: asking again with the same one is answered once.
    order_id = options.order_id or str(uuid.uuid4())
    items = [{"product_id": product, "quantity": int(n)} for product, n in options.items]
    wanted = {"order_id": order_id, "customer_id": options.customer, "items": items}
    if options.gift_note:
        wanted["gift_note"] = options.gift_note
    attributes = {"type": TYPE, "source": "/examples/python", "subject": order_id, "datacontenttype": "application/json"}
    request = CloudEvent(attributes, wanted)

    # Listening begins before the order is placed, so that no answer is missed.
    answers = await stream.subscribe("orders.>", stream="ORDERS", ordered_consumer=True, deliver_policy=DeliverPolicy.NEW)
    headers, body = to_nats(request)
    await stream.publish(f"{TYPE}.standard", body, headers=headers)
    print(f"asked for order {order_id}", flush=True)

    try:
        async with asyncio.timeout(options.timeout):
            async for message in answers.messages:
                event = from_nats(message)
                if event.get_subject() == order_id and (code := report(event)) is not None:
                    return code
    except TimeoutError:
        print(f"no end within {options.timeout} s", file=sys.stderr)
        return 2
    finally:
        await client.close()
    return 2


def report(event):
    """Prints what happened; the exit code if that was the end."""
    kind, data = event.get_type().rsplit(".v", 1)[0], event.get_data()
    if kind == "orders.created":
        total = data["total"]
        # Version 1 had a flat total and currency; a reader that has moved knows both.
        amount, currency = (total["amount"], total["currency"]) if isinstance(total, dict) else (total, data["currency"])
        print(f"created: {amount / 100:.2f} {currency}, correlation id {event.get_extension('correlationid')}", flush=True)
        return None
    if kind == "orders.confirmed":
        print(f"confirmed: paid with payment {data['payment_id']}")
        return 0
    if kind == "orders.cancelled":
        print(f"cancelled: {data['reason']}")
        return 1
    if kind == "orders.refused":
        for fault in data["faults"]:
            print(f"refused: {fault['pointer']}: {fault['detail']}")
        return 1
    return None


def line(text):
    product, _, quantity = text.partition("=")
    if not product or not quantity.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be PRODUCT=QUANTITY, for example lamp=2")
    return product, quantity


def main():
    parser = argparse.ArgumentParser(description="Places an order with Consign by publishing an event.")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="where NATS is")
    parser.add_argument("--customer", default="ada")
    parser.add_argument("--order-id", help="a UUID; a new one if left out")
    parser.add_argument("--gift-note")
    parser.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    parser.add_argument("items", nargs="+", type=line, metavar="PRODUCT=QUANTITY")
    options = parser.parse_args()
    try:
        return asyncio.run(place_order(options))
    except (nats.errors.Error, OSError) as error:
        print(f"{options.nats}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
