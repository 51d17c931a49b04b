// npm's @ai-sdk/openai-compatible: text whole and streamed, a tool, an object.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateObject, generateText, jsonSchema, streamText, tool } from 'ai'

const provider = createOpenAICompatible({
  name: 'serve_app',
  baseURL: `${process.argv[2]}/v1`,
  supportsStructuredOutputs: true,
})
const model = provider('tiny')
const options = { model, maxRetries: 0 }
const city = { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] }
const person = {
  type: 'object',
  properties: { name: { type: 'string' }, age: { type: 'integer' } },
  required: ['name', 'age'],
  additionalProperties: false,
}
let streamed = ''
for await (const text of streamText({ ...options, prompt: 'Hi' }).textStream) streamed += text
const asked = await generateText({
  ...options,
  prompt: 'What is the weather?',
  tools: { get_weather: tool({ description: 'The weather in a city.', inputSchema: jsonSchema(city) }) },
})
const [call] = asked.toolCalls
console.log(
  JSON.stringify({
    text: (await generateText({ ...options, prompt: 'Hi' })).text,
    streamed,
    tool: [call.toolName, call.input],
    parsed: (await generateObject({ ...options, prompt: 'Name a person.', schema: jsonSchema(person) })).object,
  }),
)
