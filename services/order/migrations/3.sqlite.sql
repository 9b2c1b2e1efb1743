-- Where an order is sent to, and what comes along with it.
ALTER TABLE orders ADD COLUMN shipping_address TEXT;
ALTER TABLE orders ADD COLUMN gift_note TEXT;
