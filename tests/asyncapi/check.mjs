// Reads an AsyncAPI document, says what AsyncAPI's own parser finds wrong with it, and counts what is in it.
import { readFileSync } from 'node:fs';
import { Parser } from '@asyncapi/parser';

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], 'utf8'));
// Severities: 0 error, 1 warning, 2 information, 3 hint.
const faults = diagnostics.filter((d) => d.severity < 2);
for (const d of faults) console.error(`${d.code} at ${d.path.join('/')}: ${d.message}`);
if (!document || faults.length > 0) process.exit(1);
console.log(JSON.stringify({
  version: document.version(),
  channels: document.channels().all().map((c) => c.id()),
  operations: document.operations().all().map((o) => o.id()),
}));
