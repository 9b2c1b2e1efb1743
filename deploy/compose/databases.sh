#!/bin/sh
# Each service has a database of its own, and a role that can reach no other. Run once, when the server's data directory is made.
set -eu
for service in order inventory payment; do
    password=$(printenv "$(echo "$service" | tr '[:lower:]' '[:upper:]')_PASSWORD")
    psql --set ON_ERROR_STOP=1 --set name="$service" --set password="$password" --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
done
