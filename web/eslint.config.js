import tseslint from "typescript-eslint";

export default tseslint.config(
  { ignores: ["dist", "build", "public", "scripts", "src/*.mjs", "src/*.js", "eslint.config.js"] },
  tseslint.configs.strictTypeChecked,
  { languageOptions: { parserOptions: { projectService: true } } },
);
