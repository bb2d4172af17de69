"use strict";

/* The description of the API, for people. It is drawn from /openapi.json, all of it as text, never as markup. */

const byId = (id) => document.getElementById(id);

function make(name, ...parts) {
  const element = document.createElement(name);
  element.append(...parts.filter((part) => part !== null));
  return element;
}

function quiet(text) {
  const element = make("span", text);
  element.className = "quiet";
  return element;
}

function linked(name) {
  const link = make("a", name);
  link.href = `#${name}`;
  return link;
}

/* What a value may be, as a line of text with links to the schemas that it names. */
function said(schema) {
  const parts = [];
  const add = (...more) => {
    if (parts.length) parts.push(", ");
    parts.push(...more);
  };
  if (schema.$ref) add(linked(schema.$ref.split("/").pop()));
  if (schema.type === "array") add("array of ", ...said(schema.items ?? {}));
  else if (schema.type) add([schema.type].flat().join(" or "));
  for (const [index, one] of (schema.anyOf ?? schema.allOf ?? []).entries()) {
    if (!one.$ref && !one.type) continue;
    if (index) parts.push(schema.anyOf ? " or " : " with ", ...said(one));
    else add(...said(one));
  }
  for (const [index, [member, one]] of Object.entries(schema.properties ?? {}).entries()) {
    parts.push(index ? ", " : " of ", make("code", member), " (", ...said(one), ")");
  }
  if (schema.enum) add(`one of ${schema.enum.map(String).join(", ")}`);
  for (const [word, text] of [["minimum", "from"], ["maximum", "to"], ["maxLength", "characters at most"], ["maxItems", "items at most"]]) {
    if (word in schema) add(text.endsWith("most") ? `${schema[word]} ${text}` : `${text} ${schema[word]}`);
  }
  if ("default" in schema && schema.default !== null) add(`${schema.default} unless given`);
  if (schema.description) add(schema.description);
  return parts.length ? parts : ["anything"];
}

function listed(title, rows) {
  if (!rows.length) return null;
  return make("div", make("h3", title), make("ul", ...rows.map((row) => make("li", ...row))));
}

function contents(content) {
  return Object.entries(content ?? {}).flatMap(([media, { schema }], index) => [index ? "; " : "", make("code", media), " ", ...said(schema)]);
}

function drawOperation(path, method, operation) {
  const roles = operation.security.flatMap((one) => one.key || []);
  const summary = make("summary", make("code", `${method.toUpperCase()} ${path}`), ` ${operation.summary} `);
  summary.append(quiet(roles.length ? `(${roles.join(", ")})` : "(no key)"));
  const parameters = operation.parameters.map((one) => [
    make("code", one.name),
    ` in ${one.in}${one.required ? ", required" : ""}: `,
    ...said(one.schema),
  ]);
  const body = operation.requestBody ? [contents(operation.requestBody.content)] : [];
  const answers = Object.entries(operation.responses).map(([status, answer]) => [
    make("code", status === "default" ? "otherwise" : status),
    ` ${answer.description} `,
    ...contents(answer.content),
  ]);
  return make("details", summary, listed("Parameters", parameters), listed("Body", body), listed("Answers", answers));
}

function drawSchema(name, schema) {
  const required = new Set(schema.required ?? []);
  const members = Object.entries(schema.properties ?? {}).map(([member, one]) => [
    make("code", member),
    required.has(member) ? ", always: " : ": ",
    ...said(one),
  ]);
  const details = make("details", make("summary", make("code", name), " ", ...(members.length ? [schema.description ?? ""] : said(schema))));
  details.id = name;
  if (members.length) details.append(make("ul", ...members.map((member) => make("li", ...member))));
  return details;
}

function draw(description) {
  byId("version").textContent = description.info.version;
  for (const tag of description.tags) {
    const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
      Object.entries(methods)
        .filter(([, operation]) => operation.tags.includes(tag.name))
        .map(([method, operation]) => drawOperation(path, method, operation)),
    );
    const section = make("section", make("h2", tag.description), ...operations);
    section.className = "card";
    byId("operations").append(section);
  }
  const schemas = Object.entries(description.components.schemas).sort(([one], [other]) => (one < other ? -1 : 1));
  byId("schemas").append(...schemas.map(([name, schema]) => drawSchema(name, schema)));
  byId("schemas").hidden = false;
}

function narrow() {
  const words = byId("find").value.toLowerCase().split(/\s+/);
  for (const one of document.querySelectorAll("#operations details")) {
    const text = one.querySelector("summary").textContent.toLowerCase();
    one.hidden = !words.every((word) => text.includes(word));
  }
  for (const section of document.querySelectorAll("#operations section")) {
    section.hidden = !section.querySelector("details:not([hidden])");
  }
}

/* A link to a schema opens it. */
function reveal() {
  const one = byId(decodeURIComponent(location.hash.slice(1)));
  if (!(one instanceof HTMLDetailsElement)) return;
  one.open = true;
  one.scrollIntoView();
}

async function start() {
  try {
    const response = await fetch("/openapi.json");
    if (!response.ok) throw new Error(`the daemon answered ${response.status}`);
    draw(await response.json());
    reveal();
  } catch (error) {
    byId("problem").textContent = `The description cannot be shown: ${error.message}`;
    byId("problem").hidden = false;
  }
}

byId("find").addEventListener("input", narrow);
addEventListener("hashchange", reveal);
start();
