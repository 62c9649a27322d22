// Checks types and style as tsc and eslint do, on one program: most of the time of either goes to the libraries' types.
import { ESLint } from "eslint";
import ts from "typescript";

const host = { ...ts.sys, getCanonicalFileName: (name) => name, getNewLine: () => "\n" };
const print = (diagnostics) => process.stdout.write(ts.formatDiagnosticsWithColorAndContext(diagnostics, host));
const config = ts.getParsedCommandLineOfConfigFile("tsconfig.json", {}, { ...host, onUnRecoverableConfigFileDiagnostic: (one) => print([one]) });
const program = ts.createProgram({
  rootNames: config.fileNames,
  options: config.options,
  host: ts.createCompilerHost(config.options, true), // with the nodes' parents, which eslint reads
  configFileParsingDiagnostics: config.errors,
});
const errors = ts.getPreEmitDiagnostics(program);
print(errors);

const eslint = new ESLint({ overrideConfig: { languageOptions: { parserOptions: { programs: [program], projectService: false } } } });
const results = await eslint.lintFiles(["."]);
process.stdout.write(await (await eslint.loadFormatter()).format(results));
process.exitCode = errors.length || results.some(({ messages }) => messages.length) ? 1 : 0;
