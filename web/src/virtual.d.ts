declare module "virtual:timeline" {
  /** Makes every timeline in the document answer the pointer and its slider: the script of memplan's own pages. */
  export default function drawTimelines(): void;
}
