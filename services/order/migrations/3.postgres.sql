-- Where an order is sent to, and what comes along with it.
ALTER TABLE orders ADD COLUMN shipping_address JSONB;
ALTER TABLE orders ADD COLUMN gift_note TEXT;
