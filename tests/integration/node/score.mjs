// A client of the contract in another language, written from docs/contract.md alone: nothing in it is
// generated, and it shares no code with the Python client.
//
// node score.mjs ADDRESS < request.json    prints what the server is and what it scored, as JSON
//
// request.json: {tokenIds, scoreStart, topK, candidateIds?, temperature?, halfPrecision?, model?,
// expectedModelRevision?, expectedVocabularyDigest?, deadlineS?}
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const FLOAT32 = "ELEMENT_TYPE_FLOAT32";
const FLOAT16 = "ELEMENT_TYPE_FLOAT16";
const NUMBER = { ELEMENT_TYPE_INT32: 1, [FLOAT32]: 2, [FLOAT16]: 3 };
const ELEMENT_BYTES = { ELEMENT_TYPE_INT32: 4, [FLOAT32]: 4, [FLOAT16]: 2 };

const protos = fileURLToPath(new URL("../../../proto", import.meta.url));
const definition = protoLoader.loadSync("stillhouse/v1/teacher.proto", {
  includeDirs: [protos],
  longs: Number,
  enums: String,
  defaults: true,
});
const { TeacherService } = grpc.loadPackageDefinition(definition).stillhouse.v1;

// What errors carry besides their status: google.rpc.Status in a trailer, with google.rpc.ErrorInfo inside.
const status = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`).root;

function reasonOf(error) {
  const [trailer] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!trailer) return {};
  const found = status
    .lookupType("Status")
    .decode(trailer)
    .details.find((detail) => detail.typeUrl === "type.googleapis.com/google.rpc.ErrorInfo");
  if (!found) return {};
  const info = status.lookupType("ErrorInfo").decode(found.value);
  return info.domain === "stillhouse" ? { reason: info.reason, fields: info.metadata } : {};
}

function int32Bytes(numbers) {
  const bytes = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, i) => bytes.writeInt32LE(number, 4 * i));
  return bytes;
}

function uint32(number) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(number);
  return bytes;
}

function float64(number) {
  const bytes = Buffer.alloc(8);
  bytes.writeDoubleLE(number);
  return bytes;
}

function requestDigest(request, candidates) {
  const digest = createHash("sha256");
  digest.update(Buffer.from(request.model, "utf8"));
  digest.update(Buffer.of(0));
  digest.update(uint32(request.scoreStart));
  digest.update(uint32(request.topK));
  digest.update(uint32(candidates));
  digest.update(float64(request.temperature ?? 1.0));
  digest.update(uint32(NUMBER[request.logprobDtype]));
  digest.update(request.tokenIds.data);
  if (request.candidateIds) digest.update(request.candidateIds.data);
  return digest.digest();
}

function checkArray(name, array, dtype, shape) {
  if (!array) throw new Error(`${name} is missing`);
  if (array.dtype !== dtype) throw new Error(`${name} is ${array.dtype}, not ${dtype}`);
  if (JSON.stringify(array.shape) !== JSON.stringify(shape)) {
    throw new Error(`${name} has shape ${array.shape}, not ${shape}`);
  }
  const bytes = shape.reduce((product, length) => product * length, ELEMENT_BYTES[dtype]);
  if (array.data.length !== bytes) throw new Error(`${name} has ${array.data.length} bytes, not ${bytes}`);
  return array.data.toString("base64");
}

function call(client, method, request, deadlineS) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + 1000 * deadlineS }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

async function main(address, wanted) {
  const client = new TeacherService(address, grpc.credentials.createInsecure(), {
    "grpc.max_receive_message_length": 256 * 2 ** 20,
    "grpc.max_send_message_length": 256 * 2 ** 20,
  });
  const deadlineS = wanted.deadlineS ?? 30;
  const teacher = await call(client, "GetTeacher", { model: wanted.model ?? "" }, deadlineS);

  const length = wanted.tokenIds.length;
  const rows = length - wanted.scoreStart;
  const candidates = wanted.candidateIds?.[0]?.length ?? 0;
  const logprobDtype = wanted.halfPrecision ? FLOAT16 : FLOAT32;
  const request = {
    model: wanted.model ?? "",
    tokenIds: { dtype: "ELEMENT_TYPE_INT32", shape: [length], data: int32Bytes(wanted.tokenIds) },
    scoreStart: wanted.scoreStart,
    topK: wanted.topK,
    temperature: wanted.temperature,
    logprobDtype,
    expectedModelRevision: wanted.expectedModelRevision ?? teacher.modelRevision,
    expectedVocabularyDigest: wanted.expectedVocabularyDigest ?? "",
  };
  if (candidates > 0) {
    request.candidateIds = {
      dtype: "ELEMENT_TYPE_INT32",
      shape: [rows, candidates],
      data: int32Bytes(wanted.candidateIds.flat()),
    };
  }
  const response = await call(client, "Score", request, deadlineS);
  client.close();

  const { echo } = response;
  const digest = requestDigest(request, candidates);
  if (!digest.equals(echo.requestDigest)) throw new Error("the request digest is not ours");
  if (echo.modelRevision !== request.expectedModelRevision) throw new Error("another model revision answered");

  const arrays = {};
  if (request.topK > 0) {
    arrays.topIds = checkArray("topIds", response.topIds, "ELEMENT_TYPE_INT32", [rows, request.topK]);
    arrays.topLogprobs = checkArray("topLogprobs", response.topLogprobs, logprobDtype, [rows, request.topK]);
  }
  if (candidates > 0) {
    const shape = [rows, candidates];
    arrays.candidateLogprobs = checkArray("candidateLogprobs", response.candidateLogprobs, logprobDtype, shape);
  }
  for (const name of ["sampledLogprobs", "logTail", "logSupportTail", "entropy", "logNormalizer"]) {
    arrays[name] = checkArray(name, response[name], FLOAT32, [rows]);
  }
  return { teacher, arrays, echo: { ...echo, requestDigest: digest.toString("hex") }, timings: response.timings };
}

try {
  const answer = await main(process.argv[2], JSON.parse(readFileSync(0, "utf8")));
  console.log(JSON.stringify(answer));
} catch (error) {
  console.log(
    JSON.stringify({ error: error.message, code: grpc.status[error.code] ?? null, ...reasonOf(error) }),
  );
  process.exitCode = 1;
}
